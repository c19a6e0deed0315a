"""Why a run waits or has failed, and what to type.

evidence       all that was gathered of a run: its folder, its RayJob, pods, events, queue
gather         gathers it
facts          evidence -> single facts of one form; what is over is left out. Pure
rule           what a fact means: a pattern, a sentence, a command
queueing, creation, scheduling, starting, ending, printed
               the rules, by what they are about
explain        evidence -> explanations, the one that explains most first. Pure
view           how a terminal shows them
"""
