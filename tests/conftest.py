"""Before anything of ours is imported: shapes in annotations of `ops` are checked while tests run."""

from jaxtyping import install_import_hook

from tests import shapes

install_import_hook("stackcomp.ops", f"{shapes.__name__}.check")
