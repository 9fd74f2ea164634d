//! Where log lines go. A peer that misbehaves costs one line, and all of them together no more
//! than a few lines a second.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines about peers within one [`WINDOW`]; the rest is counted.
const LINES_PER_WINDOW: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

/// Takes log lines.
#[derive(Clone)]
pub struct LogSink(Arc<dyn Fn(&str) + Send + Sync>);

impl LogSink {
    /// Hands every line, without its end, to `sink`.
    pub fn new(sink: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Drops every line.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(|_| ())
    }

    pub(crate) fn line(&self, line: fmt::Arguments<'_>) {
        (self.0)(&line.to_string());
    }
}

impl fmt::Debug for LogSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSink")
    }
}

/// A sink for lines that others can provoke.
#[derive(Debug)]
pub(crate) struct RateLimitedLog {
    sink: LogSink,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
}

impl RateLimitedLog {
    pub(crate) fn new(sink: LogSink) -> Self {
        Self { sink, window: Mutex::new(Window { began: Instant::now(), lines: 0 }) }
    }

    pub(crate) fn line(&self, line: fmt::Arguments<'_>) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.elapsed() > WINDOW {
            let left_out = window.lines.saturating_sub(LINES_PER_WINDOW);
            if left_out > 0 {
                self.sink.line(format_args!("{left_out} more such lines were left out"));
            }
            *window = Window { began: Instant::now(), lines: 0 };
        }
        window.lines += 1;
        if window.lines <= LINES_PER_WINDOW {
            self.sink.line(line);
        }
    }
}
