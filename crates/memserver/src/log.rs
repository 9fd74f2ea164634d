//! Where log lines go. A peer that misbehaves costs one line, and all of them together no more
//! than a few lines a second.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines about peers within one [`WINDOW`]; the rest is counted.
const LINES_PER_WINDOW: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// A rare change of state.
    Info,
    /// Something went wrong and was coped with.
    Warning,
    /// A person must look.
    Error,
}

impl LogLevel {
    /// In lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// A value that goes with a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogValue {
    /// A text.
    Text(String),
    /// A number.
    Number(u64),
}

impl From<String> for LogValue {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for LogValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for LogValue {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

/// One line: for people a message, for programs the name of what happened, with values.
#[derive(Debug, Clone)]
pub struct LogLine {
    /// How much it matters.
    pub level: LogLevel,
    /// What happened, the same word each time.
    pub event: &'static str,
    /// The same for people, with all values.
    pub message: String,
    /// The values, by their names.
    pub fields: Vec<(&'static str, LogValue)>,
}

impl LogLine {
    /// A line without values.
    #[must_use]
    pub fn new(level: LogLevel, event: &'static str, message: impl fmt::Display) -> Self {
        Self { level, event, message: message.to_string(), fields: Vec::new() }
    }

    /// The line with one more value.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<LogValue>) -> Self {
        self.fields.push((name, value.into()));
        self
    }
}

/// Takes log lines.
#[derive(Clone)]
pub struct LogSink(Arc<dyn Fn(&LogLine) + Send + Sync>);

impl LogSink {
    /// Hands every line to `sink`.
    pub fn new(sink: impl Fn(&LogLine) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// Drops every line.
    #[must_use]
    pub fn silent() -> Self {
        Self::new(|_| ())
    }

    /// Takes a line.
    pub fn line(&self, line: &LogLine) {
        (self.0)(line);
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

    /// Takes a line, unless there were too many just now.
    pub(crate) fn line(&self, line: &LogLine) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.elapsed() > WINDOW {
            let left_out = window.lines.saturating_sub(LINES_PER_WINDOW);
            if left_out > 0 {
                let message = format_args!("{left_out} more such lines were left out");
                let line = LogLine::new(LogLevel::Warning, "lines_left_out", message);
                self.sink.line(&line.with("lines", u64::from(left_out)));
            }
            *window = Window { began: Instant::now(), lines: 0 };
        }
        window.lines += 1;
        if window.lines <= LINES_PER_WINDOW {
            self.sink.line(line);
        }
    }
}
