"""Errors that a person can act on."""


class UserError(Exception):
  """Something the user can mend; the message is one line: what was wrong, where, what to do."""


class Fault(Exception):
  """A run had to stop (NaN, a lost device); the last good state is kept. The message is one line."""
