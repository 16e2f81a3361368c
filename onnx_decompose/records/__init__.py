"""What training left beside the weights: initializations, snapshots, optimizer states.

init_recorder      initializations as they are made, in torch
priors             records, snapshots and optimizer states that the user names
record_matching    records matched to weights by value
torch_import       the one place that imports torch
object_spec        MODULE:NAME from the command line
"""
