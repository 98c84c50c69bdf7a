"""The revisions, each a module with `upgrade`; none is ever changed once it was released."""
