"""Networks as three pure functions (`cl_jax.types.Model`); a model is found by its module name.

`layers` holds what they share; `mlp`, `cnn`, `resnet`, `vit` and `bert` hold one architecture each;
`pretrained` finds weights on this machine.
"""
