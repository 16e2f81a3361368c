"""The clock: do no harm.

bench                       two models side by side
calibration, cost_cache     the cost model's coefficients measured here, and kept
region_model, region_bench  a region as a model of its own; its plans timed
autotune                    the fastest plan as measured
no_harm                     regions that do not pay, left dense
"""
