"""The statistics and the graph theory of the method: numpy and scipy only, never ONNX.

null        what an untouched entry's distribution would be now
evidence    one weight put against its null
criteria    property P: which entries are supported, with multiplicity control
anneal      removing unsupported entries
structure   components, condensation, layers, permutations
"""
