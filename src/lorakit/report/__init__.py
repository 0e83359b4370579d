"""A run's folder leaves as one page: `read.py`, then `page.py`; `write.py` joins them."""
