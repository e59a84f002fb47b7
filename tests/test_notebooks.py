"""Every notebook runs as a notebook, with fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

jupytext = pytest.importorskip('jupytext', reason="notebooks need: pip install 'cl_jax[notebooks]'")
nbclient = pytest.importorskip('nbclient', reason="notebooks need: pip install 'cl_jax[notebooks]'")

ROOT = Path(__file__).resolve().parent.parent
SAYS = {  # a word of what each prints at its end
  'ablations': 'best accuracy',
  'edge_device': 'integers equal bit for bit',
  'edit_a_fact': 'the digest of the one that was loaded',
  'first_run': 'accuracy',
  'foundation_model': 'class means, nothing trained',
  'your_method': 'prototypes + replay',
}


def test_the_notebooks_are_those_that_are_tested():
  assert {p.stem for p in (ROOT / 'notebooks').glob('*.py')} == SAYS.keys()


@pytest.mark.usefixtures('started_quickly')
@pytest.mark.parametrize(
  'name', [n if n == 'first_run' else pytest.param(n, marks=pytest.mark.long) for n in SAYS]
)
def test_notebook_runs(name, tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_SMOKE', '1')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('MPLBACKEND', 'module://matplotlib_inline.backend_inline')
  for variable in ('IPYTHONDIR', 'JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR'):
    monkeypatch.setenv(variable, str(tmp_path / variable))
  notebook = jupytext.read(ROOT / f'notebooks/{name}.py')
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  assert SAYS[name] in ''.join(output.get('text', '') for output in outputs)
  assert any('image/png' in output.get('data', {}) for output in outputs)
