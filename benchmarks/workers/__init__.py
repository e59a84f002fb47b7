"""The contestants: each file is started as `python -m benchmarks.workers.NAME '{"option": value}'`."""
