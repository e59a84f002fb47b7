"""A training step of ViT-S/16 at 224 pixels with transformers: all weights, or LoRA of rank 8 by peft."""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import torch  # noqa: E402

from benchmarks.workers import vision  # noqa: E402

torch.set_num_threads(1)
vision.ready()

from transformers import ViTConfig, ViTForImageClassification  # noqa: E402


def prepare(kind: str, batch: int, classes: int = 100):
  torch.manual_seed(0)
  config = ViTConfig(
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    intermediate_size=1536,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=classes,
    attn_implementation='sdpa',
  )
  model = ViTForImageClassification(config)
  if kind == 'lora':
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
      model,
      LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=['q_proj', 'v_proj', 'query', 'value'],
        modules_to_save=['classifier'],
        lora_dropout=0.0,
      ),
    )
  model.train()
  params = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.SGD(params, lr=0.01, foreach=True)
  x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch) % classes

  def repeat(i):
    optimiser.zero_grad(set_to_none=True)
    loss = model(pixel_values=x, labels=y).loss
    loss.backward()
    optimiser.step()
    return {'loss': float(loss.detach())}

  return repeat, {'trained': sum(p.numel() for p in params)}


serve(lambda: prepare(**GIVEN))
