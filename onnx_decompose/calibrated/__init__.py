"""Calibrated annealing: what data supports, and what is left of a weight refitted.

search              of all proposals the fastest inside the budget
trials              the error on samples that were not fitted to, and how far the true one may be from it
identity            which search it is, as a digest
journal             what a search has found out, kept for when it is interrupted
parts               the samples in three parts
context             what generators of proposals may look at
proposals           which entries may stay
families            proposals from strict to loose, made when they are looked at
refitting           of a proposal an annealed model, made up for by what is left
decay_proposals     units whose weights contribute little, in cascade
support_proposals   groups of inputs that are active together
group_proposals     a network of its own for every group of inputs, cut from the one that all share
input_groups        inputs that are active together: whose rows, whose outputs
needed_outputs      which outputs the metric looks at where a group is active
input_proposals     inputs that hardly matter
removal_proposals   hidden units that the rest can stand in for
merge_proposals     outputs that data hardly tells apart, one column for a group
partition_proposals a given number of balanced groups, seam or not
state_axes          hidden units of recurrent operators, for removal
cells               what recurrent operators read and make, and who reads their units
cell_refits         their refit
neighbours          inputs made up around a few given ones, to fit on
site_statistics     what sites read while a model runs; inner_sites: inside bodies, where samples show enough
"""
