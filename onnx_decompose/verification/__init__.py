"""Both claims, and what is said where one does not hold.

verify            claims A and B of a rewritten model
claims            their results
proof             the weights rebuilt bit for bit, before anything runs
equivalence       claim A on outputs; rounding: what rounding may make; nudged: that of quantizers
reference         a model in float64, in onnxruntime (widened) or node by node (reference_ops)
second_opinion    errors against a bound from theory
reproducer        where claim A fails first, as small models; cut: parts of a model; unrolled: without inner graphs
metrics           the user's own measure
"""
