"""What many ranks do together: the mesh that says who is who.

Read `mesh.py`. It knows the axes and each rank's place on them; the trainer asks it which sequences
of a batch are this rank's.
"""

from .mesh import AXES, Mesh

__all__ = ["AXES", "Mesh"]
