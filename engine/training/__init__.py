"""Packed rows + an objective + a student -> its next version.

row_loss.py  hidden states of rows -> loss and metrics, by the op that does least
rundir.py    a run's folder
student.py   the model that is trained: load, prove, save
settings.py  how the weights move, and the same as transformers takes it
trainer.py   the transformers.Trainer
facts.py     what cache and student are to each other
held_out.py  loss and metrics on rows that it is not trained on
evaluate.py  accuracy on prompts that it is not trained on
run.py       a run from start to saved student
train.py     a run over the rows of a plan
"""
