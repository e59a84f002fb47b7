"""Knowledge editing: facts written into a causal language model, one at a time or a thousand at once.

A request (`rows.Edit`) becomes arrays (`rows.Requests`); an `Editor` turns them into `Write`s, terms that are
added to weights and can be taken out again; `evaluate` tells what it did to the fact, to other ways to
ask for it, to its neighbours and to everything else.
"""
