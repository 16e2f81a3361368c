"""One attempt at one level of one criterion: evidence in, annealed and rewritten model out.

gather         evidence of every site
decompose      an attempt; decompose_recurrent: the recurrent part of it
folding        units that are constants, into biases
refits         new weights, and what they add to biases
joining        products of one value as one, and where their weights lie then
renumbering    new numbers of units that make a permutation free
"""
