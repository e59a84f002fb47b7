"""Bottleneck adapters in a transformer."""

from __future__ import annotations

import jax

from cl_jax import adapters
from cl_jax.errors import UserError
from cl_jax.types import Method

PLACES = ('attention', 'feedforward')


def adapter(
  rank: int = 64,
  where: tuple[str, ...] = PLACES,
  parallel: bool = False,
  scale: float = 0.1,
) -> Method:
  """Adds small networks with a residual connection to every layer: h + up(gelu(down(h))).

  Houlsby et al., ICML 2019, section 2.1 and fig. 2; official code google-research/adapter-bert. They sit
  after the attention output and after the feed-forward output, before these are added to the residual stream.
  Pfeiffer et al., EACL 2021, keep the second: where=('feedforward',). With `parallel` the adapter stands
  beside the feed-forward block instead and reads what that reads: AdaptFormer, Chen et al., NeurIPS 2022,
  eq. 3-4; official code ShoufaChen/AdaptFormer:
  feedforward(norm(x)) + scale * up(relu(down(x))), x the residual stream before the norm.

  All adapters start as zero functions: down ~ U(+-1/sqrt(d)), up and the biases 0 (AdaptFormer's; Houlsby et
  al. draw both from a normal of 0.01). Deviations: no dropout; no norm before `down` (as in the official code
  of AdaptFormer, where eq. 3 has one); norms are trained only where they are not frozen.

  Freeze the rest by `learner(frozen=...)`. Nothing protects earlier tasks: chain it with what does.

  Args:
    rank: units of the bottleneck, r.
    where: of 'attention' and 'feedforward'; not used with `parallel`.
    parallel: beside the feed-forward block.
    scale: of parallel adapters.

  Needs a transformer (vit, bert, decoder, clip). State: none (parameters: 2 d r + d + r per adapter and
  layer).
  """
  if not where or any(place not in PLACES for place in where):
    raise UserError(f'adapter where={where!r}: give one or both of {", ".join(PLACES)}')
  taps = ('middle', 'feedforward') if parallel else tuple(where)

  def init(key, params, batch, fwd):
    layers, d = adapters.sites('adapter', taps, params, batch, fwd)
    keys = jax.random.split(key, len(PLACES))
    places = ('feedforward',) if parallel else where
    own = {p: adapters.draw(keys[PLACES.index(p)], (layers,), d, rank) for p in places}
    return {'adapter': own}, ()

  def wrap(s, apply):
    def adapted(variables, batch, tap, train):
      own = variables['adapter']
      if parallel:
        return apply(variables, batch, adapters.in_parallel(own['feedforward'], scale, tap), train)
      return apply(variables, batch, adapters.in_series(own, tap), train)

    return adapted

  return Method(init=init, wrap=wrap)
