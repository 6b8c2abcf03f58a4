"""Small files that ask for endless work: each function makes one. A new attack is one function more.

Without torch, so that a bare process can run them. Each must be refused or read within a second and
256 MiB; which of the two is said by the list that it stands in.
"""

from bombs import files, listings, pickles
from bombs.making import READ, REFUSED, ints, num, pid, tensor, text, torch_zip

__all__ = ["READ", "REFUSED", "files", "ints", "listings", "num", "pickles", "pid", "tensor", "text", "torch_zip"]
