//! The bars: what paging must reach, each a ratio of two figures of the same run.

use std::fmt;

use serde::Serialize;

use super::cases::What;
use super::figures::{Figures, Quantity};
use crate::stage::Variant;

/// What a figure is held against.
#[derive(Clone, Copy)]
enum Against {
    /// The same figure in another way of running.
    Way(Variant),
    /// One plain TCP stream.
    Stream,
    /// Nothing: the quantity is a number of its own.
    Nothing,
    /// Nothing: the run must end with the right result.
    Ending,
}

/// On which side of the target a figure must be.
#[derive(Clone, Copy)]
enum Side {
    AtMost,
    AtLeast,
}

/// One bar.
struct Bar {
    what: What,
    variant: Variant,
    quantity: Quantity,
    against: Against,
    side: Side,
    target: f64,
    aim: Option<f64>,
}

impl Bar {
    const fn new(what: What, variant: Variant, against: Against, side: Side, target: f64) -> Self {
        Self { what, variant, quantity: Quantity::Value, against, side, target, aim: None }
    }

    const fn of(mut self, quantity: Quantity) -> Self {
        self.quantity = quantity;
        self
    }

    const fn aim(mut self, aim: f64) -> Self {
        self.aim = Some(aim);
        self
    }

    /// The figure to compare with the target.
    fn figure(&self, figures: &Figures) -> Option<f64> {
        let figure = figures.of(self.what, self.variant, self.quantity)?;
        Some(match self.against {
            Against::Nothing => figure,
            Against::Ending => 1.0,
            Against::Stream => figure / figures.stream()?,
            Against::Way(other) => {
                let other = figures.of(self.what, other, self.quantity)?;
                // Bars that say "at least" speak of speed.
                match (self.side, self.what.is_throughput()) {
                    (Side::AtLeast, false) => other / figure,
                    _ => figure / other,
                }
            }
        })
    }

    fn text(&self) -> String {
        let Self { what, variant, quantity, .. } = self;
        let name = what.name();
        match (quantity, self.against) {
            (Quantity::Cpu, Against::Way(other)) => {
                format!("{name}: processor time of {variant} / {other}")
            }
            (Quantity::ResidentAboveLimit, _) => {
                format!("{name}: MiB of VmHWM above the limit, {variant}")
            }
            (Quantity::AnonymousAboveLimit, _) => {
                format!("{name}: MiB of RssAnon above the limit, {variant}")
            }
            (_, Against::Ending) => format!("{name}: ends with the right result, {variant}"),
            (_, Against::Stream) => format!("{name}: {variant} / plain TCP stream"),
            (_, Against::Way(other)) => match self.side {
                Side::AtMost => format!("{name}: time of {variant} / {other}"),
                Side::AtLeast => format!("{name}: speed of {variant} / {other}"),
            },
            (_, Against::Nothing) => format!("{name}: {variant}"),
        }
    }
}

fn bars() -> Vec<Bar> {
    use Against::{Ending, Nothing, Stream, Way};
    use Side::{AtLeast, AtMost};
    use Variant::{Native, SwapFile, Tcp, Unix, Zram};
    let mut bars = vec![
        Bar::new(What::Random, Tcp, Way(Zram), AtMost, 1.6),
        Bar::new(What::Random, Unix, Way(Zram), AtMost, 1.3),
        Bar::new(What::Sequential, Tcp, Stream, AtLeast, 0.4).aim(0.6),
    ];
    for way in [Unix, Tcp] {
        let redis = if way == Tcp { 0.75 } else { 0.9 };
        bars.extend([
            Bar::new(What::Fits, way, Way(Native), AtMost, 1.02),
            Bar::new(What::Random, way, Way(SwapFile), AtMost, 0.5),
            Bar::new(What::Random, way, Way(Zram), AtMost, 2.0).of(Quantity::Cpu),
            Bar::new(What::Random2, way, Way(Zram), AtLeast, 0.8),
            Bar::new(What::Sequential, way, Way(Zram), AtLeast, 5.0).aim(8.0),
            Bar::new(What::Write, way, Way(Zram), AtLeast, 4.0).aim(6.0),
            Bar::new(What::Stride5, way, Way(Zram), AtLeast, 3.0),
            Bar::new(What::PydictScan, way, Way(Zram), AtLeast, 3.0),
            Bar::new(What::Sort, way, Ending, AtLeast, 1.0),
        ]);
        for what in [What::RedisGet, What::RedisSet] {
            bars.push(Bar::new(what, way, Way(Zram), AtLeast, redis).aim(1.0));
            bars.push(Bar::new(what, way, Way(SwapFile), AtLeast, 3.0));
        }
        let arrays = [What::Random, What::Random2, What::Sequential, What::Write, What::Stride5];
        let resident = Quantity::ResidentAboveLimit;
        bars.extend(arrays.map(|what| Bar::new(what, way, Nothing, AtMost, 32.0).of(resident)));
        let anonymous = Quantity::AnonymousAboveLimit;
        let programs = [What::RedisGet, What::PydictScan, What::Sort];
        bars.extend(programs.map(|what| Bar::new(what, way, Nothing, AtMost, 32.0).of(anonymous)));
    }
    bars.sort_by_key(|bar| (bar.what, bar.variant));
    bars
}

/// A bar and whether it was reached.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    text: String,
    side: &'static str,
    target: f64,
    aim: Option<f64>,
    figure: Option<f64>,
    /// None if it was not measured.
    pub(crate) met: Option<bool>,
    why_not_measured: Option<String>,
    /// What the figure is held against was tried and failed: nothing is known of this bar.
    pub(crate) comparator_failed: bool,
}

/// Holds all figures against all bars; bars of cases that were not run are left out.
pub(crate) fn judge(figures: &Figures) -> Vec<Verdict> {
    let run = figures.whats();
    bars().iter().filter(|bar| run.contains(&bar.what)).map(|bar| verdict(bar, figures)).collect()
}

fn verdict(bar: &Bar, figures: &Figures) -> Verdict {
    let failure = figures.failure(bar.what, bar.variant);
    let comparator = match bar.against {
        Against::Way(other) => figures.failure(bar.what, other).map(|why| (other, why)),
        Against::Stream | Against::Nothing | Against::Ending => None,
    };
    let comparator_failed = failure.is_none() && comparator.is_some();
    let figure = bar.figure(figures).filter(|_| failure.is_none() && !comparator_failed);
    let met = match (figure, bar.side) {
        (Some(figure), Side::AtMost) => Some(figure <= bar.target),
        (Some(figure), Side::AtLeast) => Some(figure >= bar.target),
        // What failed has missed its bar; what was skipped has not been judged.
        (None, _) => failure.map(|_| false),
    };
    Verdict {
        text: bar.text(),
        side: match bar.side {
            Side::AtMost => "at most",
            Side::AtLeast => "at least",
        },
        target: bar.target,
        aim: bar.aim,
        figure,
        met,
        why_not_measured: match (failure, comparator) {
            (Some(why), _) => Some(format!("failed: {why}")),
            (None, Some((other, why))) => Some(format!("not measured: {other} failed: {why}")),
            (None, None) => None,
        },
        comparator_failed,
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.met {
            Some(true) => "met   ",
            Some(false) => "MISSED",
            None => "-     ",
        };
        let Self { text, side, target, .. } = self;
        write!(f, "{word} {text}: ")?;
        match (self.figure, &self.why_not_measured) {
            (Some(figure), _) => write!(f, "{figure:.3}")?,
            (None, Some(why)) => f.write_str(why)?,
            (None, None) => write!(f, "not measured")?,
        }
        write!(f, " ({side} {target}")?;
        self.aim.map_or(Ok(()), |aim| write!(f, ", aim {aim}"))?;
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cases::{Case, Run};
    use crate::stage::Peak;

    #[test]
    fn a_bar_without_its_comparator_is_not_measured_and_told() {
        let run = || Run {
            what: What::Random,
            value: Some(10.0),
            cpu_us_per_unit: None,
            limit_bytes: 1,
            peak: Peak::default(),
            stats: None,
        };
        let bar =
            Bar::new(What::Random, Variant::Unix, Against::Way(Variant::Zram), Side::AtMost, 1.3);
        let mut figures = Figures::default();
        figures.add(Variant::Unix, vec![run()]);
        figures.skip(Variant::Zram, "not root");
        let skipped = verdict(&bar, &figures);
        assert_eq!((skipped.met, skipped.comparator_failed), (None, false));
        // A round that went well says nothing of one that failed.
        figures.add(Variant::Zram, vec![run()]);
        figures.fail(Case::Random, Variant::Zram, "killed");
        let failed = verdict(&bar, &figures);
        assert_eq!((failed.met, failed.figure, failed.comparator_failed), (None, None, true));
        assert!(failed.to_string().contains("not measured: zram failed: killed"), "{failed}");
        figures.fail(Case::Random, Variant::Unix, "wrong byte");
        let own = verdict(&bar, &figures);
        assert_eq!((own.met, own.comparator_failed), (Some(false), false));
    }
}
