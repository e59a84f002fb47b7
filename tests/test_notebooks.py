"""Every notebook runs as a notebook, with fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

jupytext = pytest.importorskip('jupytext', reason="notebooks need: pip install 'cl_jax[notebooks]'")
nbclient = pytest.importorskip('nbclient', reason="notebooks need: pip install 'cl_jax[notebooks]'")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('path', sorted((ROOT / 'notebooks').glob('*.py')), ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_SMOKE', '1')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
  for name in ('IPYTHONDIR', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR'):
    monkeypatch.setenv(name, str(tmp_path / name))
  notebook = jupytext.read(path)
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  text = ''.join(output.get('text', '') for output in outputs)
  assert 'accuracy' in text
  assert any('image/png' in output.get('data', {}) for output in outputs)
