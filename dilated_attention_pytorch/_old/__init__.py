"""The past: what 0.1 and 0.2 had, until 0.4.0, when this folder goes with all lines marked `0.4.0: goes with _old`.

`names` is the table of old names, `places/` holds old import paths, `package` shows old names where new ones are,
`calls` knows old argument lists, and `migrate/` finds old names in a code base. The other files hold what stands in for
an old name: each class takes the old arguments, in the old order, and is a thin subclass of the class that took its
place: the one exception to "abstract or never subclassed", because users pickle, copy, subclass and `isinstance` these
names.
"""
