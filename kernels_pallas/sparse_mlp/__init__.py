"""An MLP of which only some neurons are computed: one file a platform."""
