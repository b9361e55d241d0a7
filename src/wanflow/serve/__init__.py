"""Keep jobs, run them and offer them: the queue, the worker, the HTTP interface and the page."""
