"""SPO-VLM: safety steering of vision-language models on Ray.

    prompts + pictures --extract (Ray Data)--> pooled activations (Parquet)
      --estimate--> steering vector, Stage I: one direction a layer, from several sources
      --train: rollouts (engine actors) -> rewards (scorer actors) -> learner (Ray Train)-->
        the same vector, refined, Stage II
      --evaluate--> report: safety, utility, attacks, with intervals
      --export--> artifact

`spo.records` holds the nouns, `spo.vector` the conventions, `spo.pipeline` the order.
Importing this package loads nothing heavy.
"""
