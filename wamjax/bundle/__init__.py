"""Policy bundles: a folder that holds everything a policy needs to act, and the loaded policy.

    policy = wamjax.load_policy("bundles/libero")
    actions = policy({"images": {"image": uint8 (224, 224, 3), "wrist_image": ...},
                      "proprio": (8,), "instruction": "open the drawer"})       # (32, 7)

`wamjax.export_policy` writes bundles. The run, its data and the text encoder are not needed
afterwards.

* `files`: the folder
* `policy`: loads the folder as a function
* `observation`: checks a robot's observation and converts it to the function's arrays
"""
