"""Types are checked at run time in every test: jaxtyping's annotations by beartype."""

import jaxtyping

jaxtyping.install_import_hook("jsoftmax", "beartype.beartype")
