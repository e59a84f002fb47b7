"""W2 in PyTorch: channels last, autograd, one update for all parameters, random numbers drawn ahead."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.workers import torch_models  # noqa: E402

torch.set_num_threads(1)


def prepare(
  data: str,
  net: str = 'cnn',
  memory: int = 100,
  draw: int = 16,
  rate: float = 0.1,
  channels_last: bool = True,
):
  layout = torch.channels_last if channels_last else torch.contiguous_format
  with np.load(data) as stored:
    image = lambda a: torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2)))  # noqa: E731
    x, y = image(stored['x']), torch.from_numpy(stored['y'].astype('i8'))
    index = torch.from_numpy(stored['index'].astype('i8'))
    tests = [
      (image(a), torch.from_numpy(b.astype('i8')))
      for a, b in zip(stored['test_x'], stored['test_y'], strict=True)
    ]
  tasks, steps, size = index.shape
  classes = int(y.max()) + 1
  pixels = lambda a: (a.float() / 255).contiguous(memory_format=layout)  # noqa: E731

  def repeat(i):
    torch.manual_seed(i)
    model = torch_models.make(net, 0, classes).to(memory_format=layout)
    params = list(model.parameters())
    n = torch.arange(tasks * steps * size)
    j = (torch.rand(len(n), dtype=torch.float64) * (n + 1)).long()
    slots = torch.where(n < memory, n, j.clamp(max=memory)).view(-1, size)
    old_x = torch.zeros((memory + 1, *x.shape[1:]), dtype=torch.uint8)
    old_y = torch.zeros(memory + 1, dtype=torch.int64)

    @torch.inference_mode()
    def evaluate():
      model.eval()
      right = [
        (torch.cat([model(pixels(part)) for part in a.split(200)]).argmax(1) == b).float().mean()
        for a, b in tests
      ]
      model.train()
      return torch.stack(right)

    R, seen = [evaluate()], 0
    for rows in index.view(-1, steps, size):
      for step in rows:
        new_x, new_y = x[step], y[step]
        now_x, now_y = new_x, new_y
        if seen:
          picked = torch.randperm(min(seen, memory))[:draw]
          now_x, now_y = torch.cat([new_x, old_x[picked]]), torch.cat([new_y, old_y[picked]])
        loss = F.cross_entropy(model(pixels(now_x)), now_y)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
          torch._foreach_add_(params, grads, alpha=-rate)
        at = slots[seen // size]
        old_x[at], old_y[at] = new_x, new_y
        seen += size
      R.append(evaluate())
    return {'accuracy': float(R[-1].mean())}

  return repeat, {'torch': torch.__version__}


serve(lambda: prepare(**GIVEN))
