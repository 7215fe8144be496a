"""Unstable parts of other libraries, one file a library.

Owns every use of something private, undocumented or recently changed in a library that the kit depends on, and what to
do where it is missing. Asks for features, never for versions. Knows nothing of the rest of the kit.
"""
