"""The whole paper in one command: its parts in order, how they went, and one page about all of them."""
