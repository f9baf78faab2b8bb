"""Every key of a run, its default and what it means; an experiment file changes what it is about.

Command: python -m launch.train --config=configs/base.py --workdir=runs/base
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the defaults: a byte-level model of 0.8 million parameters."""
    config = ConfigDict()

    config.model = ConfigDict()
    config.model.layers = 4  # number of Transformer blocks
    config.model.width = 128  # residual stream, D
    config.model.heads = 4  # query heads; the head width is width / heads
    config.model.kv_heads = 4  # key and value heads; fewer than heads is grouped-query attention
    config.model.mlp_width = 512  # hidden width of the MLP, F
    config.model.activation = "gelu"  # gelu | relu2 | swiglu (a third MLP matrix)
    config.model.norm = "rmsnorm"  # rmsnorm | layernorm, before each sub-block and at the end
    # learned | binary | affine | random_codes | gaussian | projected | learned_low_rank
    config.model.embedding = "learned"  # input interface, by a name of lm/model/embeddings.py
    config.model.embedding_rank = 32  # learned_low_rank only: width of the first factor
    config.model.code_bits = 0  # bits of a code, K; 0 is the fewest, ceil(log2 vocabulary)
    config.model.code_values = "zero_one"  # zero_one | plus_minus_one: what the bits become
    config.model.code_layout = "tile"  # tile | interleave: how a code is repeated to the width
    config.model.code_scale = 1.0  # factor on codes and gaussian vectors
    config.model.code_signs = "none"  # none | alternate | random: a fixed sign for each copy
    config.model.code_seed = 0  # of affine, random_codes, gaussian and random signs
    config.model.accept_aliasing = False  # layernorm: let two tokens be the same to the model
    config.model.tied_head = False  # use the embedding table as the output head
    config.model.code_head = False  # use the codes of all tokens as the output head
    config.model.rope_base = 10_000.0  # longest wavelength of the rotary positions is 2 pi base
    config.model.qk_norm = False  # RMSNorm on each query and key head
    config.model.logit_softcap = 0.0  # logits become cap * tanh(logits / cap); 0 is off
    config.model.attention = "auto"  # auto | einsum | xla | cudnn | splash (TPU)
    config.model.remat = "none"  # none | full | dots: what the backward pass recomputes
    config.model.unroll = 0  # layers in one turn of the loop; 0: up to 8 without remat, else 1
    config.model.dtype = "float32"  # compute dtype: float32 | bfloat16
    config.model.param_dtype = "float32"  # storage dtype of parameters: float32 | bfloat16

    config.data = ConfigDict()
    config.data.corpus = "stdlib"  # stdlib | tfds:NAME[/config] | FOLDER | FILE.jsonl; commas mix
    config.data.mixture_weights = ()  # one weight a corpus; () is in proportion to documents
    config.data.tokenizer = "bytes"  # bytes | bpe (trained on the corpus) | FILE/tokenizer.json
    config.data.vocab_size = 0  # entries of a bpe tokenizer; 0 for all others: their own
    config.data.sequence_length = 256  # tokens a row, T
    config.data.packing = "concat"  # concat (and split) | best_fit (documents stay whole)
    config.data.corrupted = 0.0  # share of training documents whose words are put in random order
    config.data.shuffle_rows = 1024  # rows of one shuffle window, after packing
    config.data.validation_fraction = 0.05  # share of documents held out, by a hash of their name
    config.data.streams = 0  # shares of the corpora that a batch is made of; 0 is one a process
    config.data.workers = 0  # processes that prepare batches; 0 is a thread
    config.data.directory = ""  # where corpora are cached; "" is ~/.cache/nibble

    config.train = ConfigDict()
    config.train.steps = 1000  # optimizer steps
    config.train.batch_size = 16  # rows of one optimizer step over all devices, B
    config.train.accumulation = 1  # micro-batches that one step is split into
    config.train.seed = 0  # of initialisation and data order
    config.train.ema_decay = 0.0  # exponential moving average of parameters; 0 is off
    config.train.spike_factor = 0.0  # skip steps with gradient norm above this x its mean; 0 is off
    config.train.max_skips = 10  # abort after this many skipped steps in a row
    config.train.log_every = 10  # steps between lines of metrics.jsonl and of the log
    config.train.peak_flops = 0.0  # FLOP/s of one device for the MFU; 0 looks up known accelerators
    config.train.tensorboard = True  # TensorBoard event files, in a local work directory
    config.train.wandb_project = ""  # Weights & Biases project; "" is off
    config.train.wandb_group = ""  # its group of runs; launch.ablate sets the ablation's name

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | lion | muon (AdamW for all that is not a matrix)
    config.optimizer.peak_learning_rate = 2e-3  # after warmup; of the matrices under muon
    config.optimizer.adam_learning_rate = 2e-3  # muon only: peak for embedding, head and norms
    config.optimizer.schedule = "cosine"  # cosine | wsd (warmup, stable, decay) | constant
    config.optimizer.warmup_steps = 50  # linear from 0
    config.optimizer.decay_fraction = 0.2  # wsd only: share of the steps in the decay
    config.optimizer.decay_shape = "linear"  # wsd only: linear | cosine | sqrt (1 - sqrt)
    config.optimizer.final_fraction = 0.1  # last learning rate / peak
    config.optimizer.weight_decay = 0.1  # decoupled, on matrices only
    config.optimizer.beta1 = 0.9  # AdamW and Lion: momentum
    config.optimizer.beta2 = 0.98  # AdamW and Lion: second momentum
    config.optimizer.momentum = 0.95  # muon only, Nesterov
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0 is off

    config.objective = ConfigDict()
    # weighted (a weighted mean of one loss a token), or another of objectives.OBJECTIVES
    config.objective.name = "weighted"
    # cross_entropy, or a section of `_losses`
    config.objective.loss = "cross_entropy"
    # uniform (the weights of the data), or a section of `_weightings`; "dft*dynamic" multiplies
    config.objective.weighting = "uniform"
    config.objective.normalisation = "kept"  # kept | all | sequence: what the loss is divided by
    config.objective.z_loss = 0.0  # coefficient of the mean squared log-sum-exp
    config.objective.block_size = 1024  # vocabulary entries of one block of the cross-entropy
    config.objective.update(_losses())
    config.objective.update(_weightings())

    # Where what a weighting compares with comes from: ema (the average of the model's parameters,
    # with train.ema_decay above 0), a work directory (its newest checkpoint, as a second, frozen
    # model) or a folder of launch.score. Read where the weighting needs it; "" is nowhere.
    config.objective.references = ConfigDict()
    config.objective.references.reference_nll = ""  # rho1: losses that the excess is over
    config.objective.references.history_nll = ""  # ss_token: losses that progress is measured from
    config.objective.references.prior_nll = ""  # prior: losses of a model without the context
    config.objective.references.full_nll = ""  # block_sensitive: losses under full attention
    config.objective.references.likelihood = ""  # frequency_equity: scores only
    config.objective.references.contrast_probability = ""  # critical_token: scores only
    config.objective.references.error_mask = ""  # fait: scores only
    config.objective.references.faulty_log_probability = ""  # fait: scores only
    config.objective.references.teacher = ""  # of a distillation: ema or a work directory

    config.quantization = ConfigDict()
    config.quantization.bits = 16.0  # of the layers' matrices: 1, 1.58, 2 to 8; 16 is off
    # paretoq (by width: elastic_binary, ternary, seq, lsq) | absmax | minmax | dense_shift | ...
    config.quantization.quantizer = "paretoq"  # a name of objectives/quantization QUANTIZERS
    # tensor | channel | group: weights that share a scale; "" is the quantizer's own
    config.quantization.granularity = ""
    config.quantization.group_size = 0  # group only: inputs that share a scale; 0 is its own
    # none | int4 to int8 | fp8_e4m3 | fp8_e5m2: inputs of the layers' products, one scale a token
    config.quantization.activations = "none"
    config.quantization.fraction = "optimal"  # share of the steps with quantization, or "optimal"
    config.quantization.fused_cooldown = True  # decay the learning rate inside the quantized phase
    config.quantization.warmup_steps = 20  # not fused: warmup of the quantized phase
    config.quantization.peak_factor = 1.0  # not fused: its peak learning rate / the first phase's
    config.quantization.reset_optimizer = False  # begin the quantized phase with fresh moments
    # steps of learned scales are the learning rate times the scale, not the learning rate alone
    config.quantization.relative_scale_steps = True
    config.quantization["from"] = ""  # a full-precision run whose checkpoint is the first phase
    config.quantization.gptq_batches = 8  # at the switch, calibration of GPTQ to compare; 0 is off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # data parallel; -1 takes the devices that are left
    config.mesh.fsdp = 1  # data parallel with parameters sharded
    config.mesh.tensor = 1  # heads, MLP and vocabulary sharded
    config.mesh.sequence = 1  # sequence sharded
    # With fsdp or tensor, share of the parameters that every device may hold whole
    config.mesh.unsharded_tolerance = 0.02

    config.distributed = ConfigDict()  # several processes that train together
    config.distributed.processes = 0  # refuse another number of them; 0 is any
    config.distributed.join_seconds = 300  # how long to wait for all of them at the start
    config.distributed.heartbeat_seconds = 100  # silence after which one counts as lost

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # 0 is off; the last step is always saved
    config.checkpoint.every_minutes = 10.0  # 0 is off
    config.checkpoint.keep = 2  # newest checkpoints kept
    config.checkpoint.keep_best = 1  # checkpoints kept for their validation loss
    # After a signal, how long an evaluation or calibration under way may go on before it is
    # abandoned and the state is saved
    config.checkpoint.grace_seconds = 10.0
    config.checkpoint.at_steps = ()  # steps that are saved besides, and never removed

    config.evaluation = ConfigDict()
    config.evaluation.every_steps = 250  # 0 is only at the end
    config.evaluation.batches = 32  # validation batches during training; 0 and the end use all
    config.evaluation.sample_tokens = 100  # tokens of the text sample; 0 is none
    config.evaluation.sample_prompt = "def "  # what the sample continues
    config.evaluation.ngram_order = 0  # Witten-Bell byte n-gram to compare with; 0 is none
    return config.lock()  # a key that is not here is an error


def _losses() -> ConfigDict:
    """Hyper-parameters of each loss, in a section of its name; see objectives/losses/."""
    c = ConfigDict()

    c.dice = ConfigDict()
    c.dice.alpha = 0.0  # exponent of 1 - p, which takes easy tokens out; 0 is off
    c.dice.smooth = 1e-4  # added above and below, in tokens
    c.dice.squared = False  # squares below

    c.tversky = ConfigDict()
    c.tversky.alpha = 0.3  # price of false positives
    c.tversky.beta = 0.7  # price of false negatives
    c.tversky.smooth = 1.0  # added above and below, in tokens

    c.one_token_rollout = ConfigDict()
    c.one_token_rollout.samples = 256  # draws a token; 0 is the exact expectation
    c.one_token_rollout.temperature = 1.0  # of the draws
    c.one_token_rollout.beta = -0.1  # reward of all tokens but the label

    c.tempnet = ConfigDict()
    c.tempnet.rho = 8.0  # divergence from uniform that a temperature aims at, nats
    c.tempnet.tau_min = 0.5  # lowest temperature
    c.tempnet.tau_max = 5.0  # highest temperature
    c.tempnet.width = 256  # hidden width of the network
    c.tempnet.dropout = 0.5  # in the network, in training
    c.tempnet.learning_rate = 2e-6  # peak, of the network; 0 is that of the model

    c.harmonic = ConfigDict()
    c.harmonic.distance = "euclidean"  # euclidean | cosine | bray_curtis | mahalanobis
    c.harmonic.exponent = 0.0  # of the distance (its square, for two of them); 0 is sqrt(width)
    c.harmonic.epsilon = 1e-4  # added to every distance
    c.harmonic.absolute = False  # bray_curtis: divide by the sum of absolute values

    c.block_distillation = ConfigDict()
    c.block_distillation.block_length = 64  # tokens that see each other
    return c


def _weightings() -> ConfigDict:
    """Hyper-parameters of each weighting, in a section of its name; see objectives/weighting/."""
    c = ConfigDict()

    c.rho1 = ConfigDict()
    c.rho1.keep = 0.6  # share of the batch's targets, those of the largest excess loss

    c.ss_token = ConfigDict()
    c.ss_token.keep = 0.6  # share of a row's targets
    c.ss_token.gamma = 0.5  # 1 scores by progress alone, 0 by attention to the prompt alone
    c.ss_token.attention_row = "label"  # label | predictor: whose attention scores a target

    c.prior = ConfigDict()
    c.prior.alpha = 1.0  # exponent of 1 - P_reference; 0 is off

    c.fait = ConfigDict()
    c.fait.strength = 1.0  # extra weight of tokens that a faulty answer lacks; 0 is off

    c.sat_imp = ConfigDict()
    c.sat_imp.beta1 = 5.0  # exponent of p
    c.sat_imp.beta2 = 1.0  # exponent of 1 - p; 0.1 in the authors' README
    c.sat_imp.ascend = True  # negative weights: unlearn what is trained on

    c.sim_sat = ConfigDict()
    c.sim_sat.beta = 5.0  # exponent of p
    c.sim_sat.ascend = True  # negative weights: unlearn what is trained on

    c.sim_imp = ConfigDict()
    c.sim_imp.beta = 5.0  # exponent of 1 - p
    c.sim_imp.ascend = True  # negative weights: unlearn what is trained on

    c.wga = ConfigDict()
    c.wga.beta = 1.0  # exponent of p
    c.wga.ascend = True  # negative weights: unlearn what is trained on

    c.dft = ConfigDict()
    c.dft.exponent = 1.0  # of p; 0 is off

    c.focal = ConfigDict()
    c.focal.gamma = 2.0  # exponent of 1 - p; 0 is off
    c.focal.detach = False  # treat the weight as a constant in the gradient

    c.block_sensitive = ConfigDict()
    c.block_sensitive.strength = 1.0  # extra weight of tokens that blocks harm most; 0 is off

    c.uskd = ConfigDict()
    c.uskd.strength = 1.0  # of p^2 minus its mean; 0 is off

    c.frequency_equity = ConfigDict()
    c.frequency_equity.eta = 1.0  # floor of the weight
    c.frequency_equity.gamma = 5.0  # exponent of 1 - frequency; 0 is off

    c.critical_token = ConfigDict()
    c.critical_token.strength = 1.0  # of the contrast of right and wrong answers; 0 is off

    c.dynamic = ConfigDict()
    c.dynamic.strategy = "lin_upper"  # lin_upper | quadratic | extremes
    c.dynamic.temperature = 1.0  # of the softmax over rows; infinity is off
    c.dynamic.delta = 1.0  # half the range of the scaled losses
    c.dynamic.burn_in = 0  # steps without reweighting
    c.dynamic.initial_temperature = 100.0  # during the first anneal_steps
    c.dynamic.anneal_steps = 0  # 0 is none
    c.dynamic.anneal = "step"  # step (hold, then jump) | geometric (fall)

    c.glow = ConfigDict()
    c.glow.samples = 0  # length of the table of past losses; 0: as many as training documents
    c.glow.alpha = 2.0  # scale; 2 is neutral for a sample that stands still
    c.glow.beta = 10.0  # steepness in the change of loss; 0 is off
    c.glow.lowest = 0.5  # smallest weight
    c.glow.highest = 5.0  # largest weight

    c.q_tuning = ConfigDict()
    c.q_tuning.keep_samples = 0.25  # share of rows
    c.q_tuning.keep_tokens = 0.5  # share of the tokens of rows of high perplexity, low entropy
    c.q_tuning.smoothing = 0.5  # weight of the neighbours in the score of a token
    c.q_tuning.prune = "highest"  # highest | lowest: which scores are removed
    c.q_tuning.neighbours = "mean"  # mean | sum
    return c
