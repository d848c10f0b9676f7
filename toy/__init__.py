"""A toy world of seven emotions: drawn faces, synthetic voices, and a small base model that knows
them.

An emotion is a face *and* a voice; neither alone tells all seven apart (`world.EMOTIONS`):

            happy      surprise   fear       angry  disgust   sad       neutral
    face    smile      wide       wide       glare  glare     frown     flat
    voice   high_fast  high_fast  trembling  harsh  low_slow  low_slow  even

A clip is an ordinary mp4 file (H.264 + AAC) of 2 to 3 seconds. The face starts near neutral and
moves into its expression, blinking and nodding; colours, position, size, line width, speaker and
noise vary from clip to clip. Everything follows from one seed, clip by clip, in whatever order the
clips are drawn. The splits (`world.SPLITS`):

    text        no clips: questions and answers in all tags and words, paired at random, to
                pretrain a language model
    base        every face with every voice, and what the two do, in words; no emotion is named
    cold_start  <think> names face and voice, <answer> an open-vocabulary word: happy, or joyful,
                or cheerful
    train, validation, test    the label alone
    test_ood    other colours, lines, speakers, and more noise
    swapped     the face of one test clip with the voice of another, where the table then names
                another emotion

    python -m toy                              # all clips and manifests, under runs/toy
    python -m toy --splits test test_ood       # some of them
    python -m toy --sheet sheet.png            # a picture of this world
    python -m toy --base toy/base              # the base model again, from its seed
                                               # (about 20 minutes on 2 cores)

    world.py    words and rules: the table above, manifests, what a true statement is
    worlds.py   other worlds: wrong, few, unequal labels, labels by a rule, walls that tell
    drawing.py  faces, voices, clips
    files.py    a checkpoint directory, all but the weights
    stages.py   base model, cold start, and what `python train_grpo.py` needs
    base/       the base model as shipped

Left out: a photograph's light and texture, speech with words in it, faces that disagree with
themselves.
"""
