//! Log lines as they are written.

use std::time::{Duration, SystemTime};

use farmem_memserver::{LogLine, LogValue};
use serde_json::{Map, Value};

use crate::cli::LogForm;

/// The line without its end.
pub(crate) fn written(line: &LogLine, form: LogForm) -> String {
    match form {
        LogForm::Text => format!("farmem serve: {}", in_one_line(&line.message)),
        LogForm::Json => {
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            json(line, now.unwrap_or_default()).to_string()
        }
    }
}

/// Names and paths in a line are clients' words: nobody makes a second line of them, or moves a
/// terminal's cursor.
fn in_one_line(message: &str) -> String {
    let mut text = String::with_capacity(message.len());
    for character in message.chars() {
        if character.is_control() {
            text.extend(character.escape_default());
        } else {
            text.push(character);
        }
    }
    text
}

fn json(line: &LogLine, since_epoch: Duration) -> Value {
    let mut object = Map::new();
    object.insert("time".to_owned(), timestamp(since_epoch).into());
    object.insert("level".to_owned(), line.level.name().into());
    object.insert("event".to_owned(), line.event.into());
    object.insert("message".to_owned(), line.message.clone().into());
    for (name, value) in &line.fields {
        let value = match value {
            LogValue::Text(text) => text.clone().into(),
            LogValue::Number(number) => (*number).into(),
        };
        object.insert((*name).to_owned(), value);
    }
    Value::Object(object)
}

/// The time as RFC 3339 has it, in UTC.
fn timestamp(since_epoch: Duration) -> String {
    let (seconds, millis) = (since_epoch.as_secs(), since_epoch.subsec_millis());
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// Year, month and day, that many days after the first of January 1970.
fn date(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use farmem_memserver::LogLevel;

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        // As date --utc --iso-8601=seconds --date=@N says.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(timestamp(Duration::from_secs(seconds)), expected);
        }
        assert!(timestamp(Duration::from_millis(1_999)).ends_with(":01.999Z"));
    }

    #[test]
    fn a_line_of_json_holds_message_and_values() {
        let line = LogLine::new(LogLevel::Warning, "client_dropped", "dropped \"a\"\nclient")
            .with("peer", "127.0.0.1:9")
            .with("pages", 7);
        let text = json(&line, Duration::ZERO).to_string();
        assert!(!text.contains('\n'), "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["level"], "warning");
        assert_eq!(value["event"], "client_dropped");
        assert_eq!(value["message"], line.message);
        assert_eq!((&value["peer"], &value["pages"]), (&"127.0.0.1:9".into(), &7.into()));
        assert_eq!(written(&line, LogForm::Text), "farmem serve: dropped \"a\"\\nclient");
        let name = LogLine::new(LogLevel::Warning, "x", "r\u{1b}[2J\r\u{9b}\u{7}é");
        let text = written(&name, LogForm::Text);
        assert_eq!(
            text, "farmem serve: r\\u{1b}[2J\\r\\u{9b}\\u{7}é",
            "nothing that a terminal obeys"
        );
    }
}
