"""Calls of every public function with right, odd and wrong arguments: see `judge.py` for what may come of one."""
