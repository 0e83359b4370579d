"""Web page of a folder of runs, `lorakit ui`: see data, start, watch and compare runs, and chat.

The server process imports neither torch nor transformers. `workspace` reads the folder, `curves`
the metrics, `launch` starts and stops `lorakit train`; `model_worker` is a child process that
plans, prepares data and generates. `access` checks requests.
"""
