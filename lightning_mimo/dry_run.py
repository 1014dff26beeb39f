def dry_run_report(model, trainer, *, training):
    return "todo"
