"""What the graph alone says: sites, the regions that they form, and which values share their units' numbers.

study            all of it together
flat, closing    graphs inside graphs as one, and back; exposing: values inside them, seen from outside
lowering         products in other forms (einsum, quantized, recurrent, rearranged) as sites
sites            nodes with a constant weight; refusals: the others, with a reason
regions          sites joined by elementwise operators; biases, gates: where their constants are, and what takes them in
per_unit         operators that keep units apart; unit_spaces, unit_layouts: what follows from them
state_readers    who reads the units of a recurrent operator
disjoint_sets    union-find
"""
