"""Policy bundles: one folder with everything that acting takes, and the policy it becomes.

    policy = wamjax.load_policy("bundles/libero")
    actions = policy({"images": {"image": uint8 (224, 224, 3), "wrist_image": ...},
                      "proprio": (8,), "instruction": "open the drawer"})       # (32, 7)

`wamjax.export_policy` writes bundles. Neither the run, nor its data, nor a text encoder is needed
afterwards.

* `files`: the folder
* `policy`: from the folder to a function
* `observation`: what a robot sees, checked, as arrays that the function takes
"""
