"""Models as files and protos: read and checked once at the border, written whole or not at all.

model_io        reading and writing
external_data   tensors that lie beside the model
staging         a rewritten model on disk while it is checked
metadata        the decomposition inside a rewritten model
constants       the values of constants, and (constant_forms) the forms that they have
shapes          shape inference as an aid
tensors         types and graph inputs
renames         names in graphs and those inside them
validity        whether an unexpected error is the model's fault
"""
