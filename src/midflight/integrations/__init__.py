"""Tune inside the trainers of other libraries, by one callback.

=====================================  ==========================================  =======================
library                                what to add                                 extra
=====================================  ==========================================  =======================
Lightning                              `callbacks=[lightning.Tune(space)]`         `midflight[lightning]`
Hugging Face Transformers              `trainer.add_callback(hf.Tune(trainer,      `midflight[hf]`
                                       space))`
skorch                                 `callbacks=[skorch.Tune(space)]`            `midflight[skorch]`
Accelerate                             a plain `midflight.Tuner`, and              none
                                       `accelerator.register_for_checkpointing(
                                       tuner)`
=====================================  ==========================================  =======================

Each module imports its library, so import the one you use: `from midflight.integrations import lightning`.
"""
