"""onnxruntime, and what goes into it.

sessions          models opened and run
runtime_faults    what onnxruntime must be kept from
cases, feeds      inputs made up: every dynamic axis, every kind of value
samples           the user's own inputs
"""
