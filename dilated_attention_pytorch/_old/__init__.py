"""What stands in for the names of 0.1 and 0.2, until 0.4.0; `_deprecated.TABLE` points here.

Each class takes the old arguments, in the old order, and is a thin subclass of the class that took its place: the one
exception to "abstract or never subclassed", because users pickle, copy, subclass and `isinstance` these names.
"""
