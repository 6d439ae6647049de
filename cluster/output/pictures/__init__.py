"""Pictures of a run, one function per figure, and the page that shows them."""
