"""Networks as three pure functions (`cl_jax.types.Model`); a model is found by its module name.

`layers` holds what they share; `mlp`, `cnn`, `resnet`, `vit`, `clip` and `bert` hold one architecture each;
`pretrained` finds weights on this machine, `onnx_file` reads those of an ONNX export.
"""
