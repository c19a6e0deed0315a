"""A study: many runs of one job with other values, of which the best is wanted.

    space        which keys are searched, and over what
    samplers     the values of the next trial
    schedulers   how long a trial goes on
    events       what the study's log holds; all of the above is replayed from it
    engine       what a free slot does next, decided from the log

Pure but for `log`, which stores the events: nothing else here reads a clock, draws a random number
that the study's seed does not determine, or talks to Ray.
"""
