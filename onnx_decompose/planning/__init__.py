"""How a region is written: candidates, their predicted cost, the choice. Arrays and numbers, never ONNX.

plan, plan_recurrent    the choice, with its reason
candidates, stacks      ways of writing a region
copies                  what repeating equal columns takes
cost, region_cost       predicted seconds
siblings                whether products of one value become one
state_graph, borders    what a plan knows of a region
"""
