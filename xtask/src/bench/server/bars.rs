//! The bars: what the memory server must reach, ratios of two figures of the same run, and
//! times.

use std::fmt;

use serde::Serialize;

use super::contestants::Server;
use super::figures::{Figures, Way};

/// A bar and whether it was reached.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    text: &'static str,
    figure: Option<f64>,
    side: &'static str,
    target: f64,
    aim: Option<f64>,
    /// None if it was not measured.
    pub(crate) met: Option<bool>,
}

/// Holds all figures against all bars.
pub(crate) fn judge(figures: &Figures) -> Vec<Verdict> {
    let rate = |way| figures.rate(Server::Farmem, way);
    let ratio = |figure: Option<f64>, to: Option<f64>| Some(figure? / to?);
    let better = figures.better(Way::ONE_PAGE);
    let pages_of_stream = figures.stream().map(|bytes| bytes / 4096.0);
    let at_least = |text, target, aim, figure: Option<f64>| {
        let met = figure.map(|figure| figure >= target);
        Verdict { text, figure, side: "at least", target, aim, met }
    };
    let at_most = |text, target, figure: Option<f64>| {
        let met = figure.map(|figure| figure <= target);
        Verdict { text, figure, side: "at most", target, aim: None, met }
    };
    vec![
        at_least(
            "one page a request, 32 under way: farmem / the better of memcached and Redis",
            1.5,
            Some(2.0),
            ratio(rate(Way::ONE_PAGE), better),
        ),
        at_least(
            "pages a second, 64 a request: farmem / the better's with one page a request",
            3.0,
            Some(4.0),
            ratio(rate(Way::MANY_PAGES), better),
        ),
        at_least(
            "reads of 1 MiB, 4 under way: farmem / a plain TCP stream",
            0.75,
            None,
            ratio(rate(Way::MEBIBYTE), pages_of_stream),
        ),
        at_most("milliseconds to make a region of 1 TiB", 5.0, figures.create_ms()),
        at_most("milliseconds to copy it virtually", 10.0, figures.clone_ms()),
        at_most(
            "time of a first touch / of a touch of a present page",
            1.2,
            figures.touches_us().map(|(first, later)| first / later),
        ),
        at_most(
            "seconds from the start of another process to the answer to its first read",
            1.0,
            figures.restart_seconds(),
        ),
        at_least(
            "times its memory that a server served by compression alone, pages to a sixth",
            4.0,
            None,
            figures.times_memory().map(|(compressed, _)| compressed),
        ),
        at_least(
            "times its memory that a server served with a file tier, pages to a half",
            8.0,
            None,
            figures.times_memory().map(|(_, file)| file),
        ),
        at_least(
            "a backup / a file of the same length, written to the same directory",
            0.8,
            None,
            figures.backup_of_stream(),
        ),
    ]
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.met {
            Some(true) => "met   ",
            Some(false) => "MISSED",
            None => "-     ",
        };
        write!(f, "{word} {}: ", self.text)?;
        match self.figure {
            Some(figure) => write!(f, "{figure:.3}")?,
            None => f.write_str("not measured")?,
        }
        write!(f, " ({} {}", self.side, self.target)?;
        self.aim.map_or(Ok(()), |aim| write!(f, ", aim {aim}"))?;
        f.write_str(")")
    }
}
