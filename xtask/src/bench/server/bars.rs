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
    pub(crate) why_not_measured: Option<String>,
    /// It was not measured as what it compares with failed.
    pub(crate) comparator_failed: bool,
}

impl Verdict {
    fn at_least(text: &'static str, target: f64, aim: Option<f64>, figure: Option<f64>) -> Self {
        let met = figure.map(|figure| figure >= target);
        let (why_not_measured, comparator_failed) = (None, false);
        Self {
            text,
            figure,
            side: "at least",
            target,
            aim,
            met,
            why_not_measured,
            comparator_failed,
        }
    }

    fn at_most(text: &'static str, target: f64, figure: Option<f64>) -> Self {
        let met = figure.map(|figure| figure <= target);
        Self { side: "at most", met, ..Self::at_least(text, target, None, figure) }
    }

    /// Says why there is no figure, if so.
    fn or_as(mut self, why: Option<(String, bool)>) -> Self {
        if let (None, Some((why, failed))) = (self.figure, why) {
            (self.why_not_measured, self.comparator_failed) = (Some(why), failed);
        }
        self
    }
}

/// Holds all figures against all bars.
pub(crate) fn judge(figures: &Figures) -> Vec<Verdict> {
    let mut verdicts = of_reads(figures);
    verdicts.extend(of_empty_regions(figures));
    verdicts.extend(of_tiers(figures));
    verdicts.extend(of_what_is_kept(figures));
    verdicts
}

fn of_reads(figures: &Figures) -> Vec<Verdict> {
    let rate = |way| figures.rate(Server::Farmem, way);
    let ratio = |figure: Option<f64>, to: Option<f64>| Some(figure? / to?);
    let better = figures.better(Way::ONE_PAGE);
    let pages_of_stream = figures.stream().map(|bytes| bytes / 4096.0);
    vec![
        Verdict::at_least(
            "one page a request, 32 under way: farmem / the better of memcached and Redis",
            1.5,
            Some(2.0),
            ratio(rate(Way::ONE_PAGE), better),
        )
        .or_as(figures.why_no_better()),
        Verdict::at_least(
            "pages a second, 64 a request: farmem / the better's with one page a request",
            3.0,
            Some(4.0),
            ratio(rate(Way::MANY_PAGES), better),
        )
        .or_as(figures.why_no_better()),
        Verdict::at_least(
            "reads of 1 MiB, 4 under way: farmem / a plain TCP stream",
            0.75,
            None,
            ratio(rate(Way::MEBIBYTE), pages_of_stream),
        ),
    ]
}

fn of_empty_regions(figures: &Figures) -> Vec<Verdict> {
    let tables = figures.tables.as_ref();
    vec![
        Verdict::at_most("milliseconds to make a region of 1 TiB", 5.0, figures.create_ms()),
        Verdict::at_most("milliseconds to copy it virtually", 10.0, figures.clone_ms()),
        Verdict::at_most(
            "time of a first touch / of a touch of a present page",
            1.2,
            figures.touches_us().map(|(first, later)| first / later),
        ),
        Verdict::at_most(
            "MiB of tables for 1 TiB that is not used, and a copy of it",
            1.0,
            tables.map(|tables| tables.empty_bytes as f64 / f64::from(1 << 20)),
        ),
        Verdict::at_most(
            "bytes of tables for a page that is stored, of a region that is full",
            32.0,
            tables.map(|tables| tables.bytes_per_page),
        ),
    ]
}

fn of_tiers(figures: &Figures) -> Vec<Verdict> {
    let (tiers, times) = (figures.tiers.as_ref(), figures.times_memory());
    vec![
        Verdict::at_least(
            "demotion of pages to compressed ones / the bare compressor on the same pages",
            0.8,
            None,
            tiers.map(|tiers| tiers.demotion),
        ),
        Verdict::at_least(
            "promotion of compressed pages / the bare decompressor on the same pages",
            0.8,
            None,
            tiers.map(|tiers| tiers.promotion),
        ),
        Verdict::at_least(
            "times its resident peak that a server served by compression alone, pages to a sixth",
            4.0,
            None,
            times.map(|(compressed, _)| compressed),
        ),
        Verdict::at_least(
            "times its resident peak that a server served with a file tier, pages to a half",
            8.0,
            None,
            times.map(|(_, file)| file),
        ),
    ]
}

fn of_what_is_kept(figures: &Figures) -> Vec<Verdict> {
    let backup = figures.backup_of_file();
    vec![
        Verdict::at_most(
            "seconds from the start of another process to the answer to its first read",
            1.0,
            figures.restart_seconds(),
        ),
        Verdict::at_least(
            "a backup to memory / a file of the same length, written to the same directory",
            0.8,
            None,
            backup.map(|(memory, _)| memory),
        ),
        Verdict::at_least(
            "a backup to a disk / a file of the same length, written to the same directory",
            0.8,
            None,
            backup.map(|(_, disk)| disk),
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
        if let Some(why) = &self.why_not_measured {
            write!(f, ": {why}")?;
        }
        write!(f, " ({} {}", self.side, self.target)?;
        self.aim.map_or(Ok(()), |aim| write!(f, ", aim {aim}"))?;
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::server::contestants::Absence;

    fn figures(absence: Option<Absence>) -> Figures {
        let mut figures = Figures::default();
        let figure = r#"{"pages": 1, "depth": 32, "pages_per_second": 1000.0}"#;
        for server in [Server::Farmem, Server::Redis] {
            figures.add(server, serde_json::from_str(figure).unwrap());
        }
        match absence {
            Some(absence) => drop(figures.absent.insert(Server::Memcached, absence)),
            None => figures.add(Server::Memcached, serde_json::from_str(figure).unwrap()),
        }
        figures
    }

    #[test]
    fn the_better_of_two_is_not_the_only_one_that_is_there() {
        let judged = |absence| of_reads(&figures(absence)).swap_remove(0);
        let verdict = judged(None);
        assert_eq!((verdict.figure, verdict.met), (Some(1.0), Some(false)));
        let verdict = judged(Some(Absence::NotInstalled));
        assert_eq!((verdict.met, verdict.comparator_failed), (None, false));
        assert!(verdict.to_string().contains("not measured: memcached not installed"), "{verdict}");
        let failed = Absence::Failed("memcached ended at once".to_owned());
        let verdict = judged(Some(failed.clone()));
        assert_eq!((verdict.met, verdict.comparator_failed), (None, true));
        assert!(verdict.to_string().contains("memcached ended at once"), "{verdict}");
        let mut half = figures(None);
        half.absent.insert(Server::Redis, failed.clone());
        assert_eq!(of_reads(&half)[0].met, None, "a round that went well says nothing of others");
        let json = figures(Some(failed)).json(&[verdict], true).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["absent"]["memcached"]["failed"], "memcached ended at once");
        assert_eq!(json["bars"][0]["comparator_failed"], true);
    }
}
