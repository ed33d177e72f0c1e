//! A progress bar for compilations, when a person is watching.
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pavage::Progress;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Where dumps of the graph go.
pub(crate) enum Dumps {
    /// To standard error, each under its pass's name.
    Stderr,
    /// To numbered files in a folder: `03-fold.ir`.
    Folder(PathBuf),
}

/// A bar on standard error; nothing when that is no terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    dumps: Dumps,
    n_dumps: AtomicUsize,
    failed: Mutex<Option<String>>,
}

impl Bar {
    /// A bar that has not begun.
    pub(crate) fn new(dumps: Dumps) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.enable_steady_tick(Duration::from_millis(100));
        Bar { bar, dumps, n_dumps: AtomicUsize::new(0), failed: Mutex::new(None) }
    }

    /// Clears the bar. The first dump that could not be written, if any.
    pub(crate) fn finish(self) -> Option<String> {
        self.bar.finish_and_clear();
        self.failed.into_inner().ok().flatten()
    }
}

impl Progress for Bar {
    fn stage(&self, stage: &str, done: usize, total: usize) {
        let template = match total {
            0 => "{spinner} {msg} {elapsed}",
            _ => "{spinner} {msg} [{wide_bar}] {pos}/{len} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.bar.set_message(stage.to_string());
        self.bar.set_length(total as u64);
        self.bar.set_position(done as u64);
    }

    fn dump(&self, pass: &str, text: &str) {
        let n = self.n_dumps.fetch_add(1, Ordering::Relaxed);
        match &self.dumps {
            Dumps::Stderr => self.bar.suspend(|| eprintln!("// after {pass}\n{text}")),
            Dumps::Folder(folder) => {
                let path = folder.join(format!("{n:02}-{pass}.ir"));
                let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
                if let (Err(e), Ok(mut failed)) = (written, self.failed.lock()) {
                    failed.get_or_insert(format!("{}: {e}", path.display()));
                }
            }
        }
    }
}
