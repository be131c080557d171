//! Takes keys out of a TOML table one by one, notes every problem, and remembers what it was asked for, so that the
//! same lines of code give the checked values, the list of unknown keys and the example file.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, str::FromStr, time::Duration};

use toml::{Table, Value};

use crate::problem::Problem;

pub(crate) struct Reader {
    table: Table,
    problems: Vec<Problem>,
    sections: Vec<&'static str>,
    example: String,
}

/// The keys of one section.
pub(crate) struct Section<'a> {
    /// With those it stands in: `api.rates`, `api.keys[2]`.
    name: String,
    table: Table,
    known: Vec<&'static str>,
    problems: &'a mut Vec<Problem>,
    example: &'a mut String,
}

impl Reader {
    pub(crate) fn new(text: &str) -> Result<Self, Vec<Problem>> {
        let table = text.parse::<Table>().map_err(|error| vec![Problem { key: String::new(), what: format!("this is not TOML: {}", error.to_string().trim_end()) }])?;
        Ok(Self { table, problems: Vec::new(), sections: Vec::new(), example: String::new() })
    }

    pub(crate) fn section<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        self.sections.push(name);
        self.example.push_str(&format!("{}[{name}]\n", if self.example.is_empty() { "" } else { "\n" }));
        let table = match self.table.remove(name) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.problems.push(Problem { key: name.to_owned(), what: format!("is {}, but must be a section [{name}]", other.type_str()) });
                Table::new()
            }
        };
        let mut section = Section { name: name.to_owned(), table, known: Vec::new(), problems: &mut self.problems, example: &mut self.example };
        let value = read(&mut section);
        section.refuse_rest();
        value
    }

    /// All problems, once every section has been read.
    pub(crate) fn finish(mut self) -> Vec<Problem> {
        for (key, value) in &self.table {
            let what = match (nearest(key, &self.sections), value) {
                (Some(meant), Value::Table(_)) => format!("there is no such section; did you mean [{meant}]?"),
                (_, Value::Table(_)) => format!("there is no such section; there are [{}]", self.sections.join("], [")),
                _ => "there is no such key at the top; every key belongs to a section".to_owned(),
            };
            self.problems.push(Problem { key: key.clone(), what });
        }
        self.problems
    }

    pub(crate) fn example(self) -> String {
        self.example
    }
}

impl Section<'_> {
    pub(crate) fn text(&mut self, key: &'static str, default: &str, about: &str, check: impl Fn(&str) -> Result<(), &'static str>) -> String {
        self.take(key, about, &quoted(default), default.to_owned(), |value| {
            let text = value.as_str().ok_or("a text in quotes")?;
            check(text).map(|()| text.to_owned())
        })
    }

    pub(crate) fn path(&mut self, key: &'static str, default: &str, about: &str) -> PathBuf {
        self.text(key, default, about, |text| (!text.is_empty()).then_some(()).ok_or("a path")).into()
    }

    pub(crate) fn optional_path(&mut self, key: &'static str, about: &str) -> Option<PathBuf> {
        self.take(key, about, "", None, |value| match value.as_str() {
            Some(text) if !text.is_empty() => Ok(Some(PathBuf::from(text))),
            _ => Err("a path in quotes"),
        })
    }

    pub(crate) fn address(&mut self, key: &'static str, default: SocketAddr, about: &str) -> SocketAddr {
        self.take(key, about, &quoted(&default.to_string()), default, |value| {
            value.as_str().and_then(|text| text.parse().ok()).ok_or("an address such as \"127.0.0.1:8443\"")
        })
    }

    pub(crate) fn switch(&mut self, key: &'static str, default: bool, about: &str) -> bool {
        self.take(key, about, &default.to_string(), default, |value| value.as_bool().ok_or("true or false"))
    }

    pub(crate) fn count(&mut self, key: &'static str, default: usize, range: RangeInclusive<usize>, about: &str) -> usize {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        self.take(key, about, &default.to_string(), default, |value| {
            value.as_integer().and_then(|number| usize::try_from(number).ok()).filter(|number| range.contains(number)).ok_or(wanted.clone())
        })
    }

    /// A count of which 0 means that there is no limit.
    pub(crate) fn optional_count(&mut self, key: &'static str, default: usize, range: RangeInclusive<usize>, about: &str) -> Option<usize> {
        Some(self.count(key, default, range, about)).filter(|count| *count > 0)
    }

    /// US dollars: zero or more, and less than what anybody means.
    pub(crate) fn price(&mut self, key: &'static str, default: &'static str, about: &str) -> f64 {
        let fits = |price: &f64| (0.0..=1e6).contains(price);
        self.take(key, about, default, default.parse().expect("a default is a number"), |value| {
            let number = value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
            number.filter(fits).ok_or("a number from 0 to 1000000")
        })
    }

    pub(crate) fn seconds(&mut self, key: &'static str, default: usize, range: RangeInclusive<usize>, about: &str) -> Duration {
        Duration::from_secs(self.count(key, default, range, about) as u64)
    }

    pub(crate) fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&'static str, T)], about: &str) -> T {
        let (default, value) = choices[0];
        let wanted = choices.iter().map(|(name, _)| quoted(name)).collect::<Vec<_>>().join(" or ");
        self.take(key, about, &quoted(default), value, |value| {
            let name = value.as_str().ok_or(wanted.clone())?;
            choices.iter().find(|(choice, _)| *choice == name).map(|(_, value)| *value).ok_or(wanted.clone())
        })
    }

    /// A section inside this one, `[outer.name]`; read after the keys of this one, or the example would mix them.
    pub(crate) fn section<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Section<'_>) -> T) -> T {
        self.known.push(name);
        let full = format!("{}.{name}", self.name);
        self.example.push_str(&format!("\n[{full}]\n"));
        let table = match self.table.remove(name) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => {
                self.problem(name, format!("is {}, but must be a section [{full}]", other.type_str()));
                Table::new()
            }
        };
        let mut section = Section { name: full, table, known: Vec::new(), problems: &mut *self.problems, example: &mut *self.example };
        let value = read(&mut section);
        section.refuse_rest();
        value
    }

    /// Any number of sections of one kind, `[[outer.name]]`; `None` of those with a problem. The example shows `shown`,
    /// lines that stay comments.
    pub(crate) fn sections<T>(&mut self, name: &'static str, about: &str, shown: &[&str], read: impl Fn(&mut Section<'_>) -> Option<T>) -> Vec<T> {
        self.known.push(name);
        self.example.push_str(&format!("# {about}\n#   [[{}.{name}]]\n", self.name));
        for line in shown {
            self.example.push_str(&format!("#   {line}\n"));
        }
        let tables = match self.table.remove(name) {
            None => Vec::new(),
            Some(Value::Array(tables)) => tables,
            Some(other) => {
                self.problem(name, format!("is {}, but must be sections [[{}.{name}]]", other.type_str(), self.name));
                Vec::new()
            }
        };
        let mut values = Vec::new();
        for (number, table) in (1..).zip(tables) {
            let Value::Table(table) = table else {
                self.problem(name, format!("{number} is {}, but must be a section [[{}.{name}]]", table.type_str(), self.name));
                continue;
            };
            let mut unseen = String::new();
            let full = format!("{}.{name}[{number}]", self.name);
            let mut section = Section { name: full, table, known: Vec::new(), problems: &mut *self.problems, example: &mut unseen };
            values.extend(read(&mut section));
            section.refuse_rest();
        }
        values
    }

    /// A key without a default; `None`: it is missing or wrong, which has been noted.
    pub(crate) fn required<T>(&mut self, key: &'static str, wanted: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
        self.known.push(key);
        let Some(value) = self.table.remove(key) else {
            self.problem(key, format!("is missing; it must be {wanted}"));
            return None;
        };
        let read = read(&value);
        if read.is_none() {
            self.problem(key, format!("is {value}, but must be {wanted}"));
        }
        read
    }

    /// The same, where the key may be absent: `Some(None)`.
    pub(crate) fn maybe<T>(&mut self, key: &'static str, wanted: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<Option<T>> {
        if self.table.contains_key(key) { self.required(key, wanted, read).map(Some) } else {
            self.known.push(key);
            Some(None)
        }
    }

    /// Notes what is wrong with keys that are right each by itself.
    pub(crate) fn refuse(&mut self, key: &str, what: &str) {
        self.problem(key, what.to_owned());
    }

    /// A list of texts, each of which is something; empty by default.
    pub(crate) fn list<T: FromStr>(&mut self, key: &'static str, wanted: &str, about: &str) -> Vec<T> {
        self.take(key, about, "[]", Vec::new(), |value| {
            let items: Option<Vec<T>> = value.as_array().and_then(|items| items.iter().map(|item| item.as_str()?.parse().ok()).collect());
            items.ok_or_else(|| wanted.to_owned())
        })
    }

    fn take<T, W: Into<String>>(&mut self, key: &'static str, about: &str, default_text: &str, default: T, read: impl FnOnce(&Value) -> Result<T, W>) -> T {
        self.known.push(key);
        self.example.push_str(&format!("# {about}\n# {key} = {default_text}\n"));
        let Some(value) = self.table.remove(key) else { return default };
        match read(&value) {
            Ok(value) => value,
            Err(wanted) => {
                self.problem(key, format!("is {value}, but must be {}", wanted.into()));
                default
            }
        }
    }

    fn refuse_rest(&mut self) {
        let rest: Vec<String> = self.table.keys().cloned().collect();
        for key in rest {
            let what = match nearest(&key, &self.known) {
                Some(meant) => format!("there is no such key; did you mean `{meant}`?"),
                None => format!("there is no such key; [{}] has {}", self.name, self.known.join(", ")),
            };
            self.problem(&key, what);
        }
    }

    fn problem(&mut self, key: &str, what: String) {
        self.problems.push(Problem { key: format!("{}.{key}", self.name), what });
    }
}

fn quoted(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

/// The known word at an edit distance of at most 2, if there is one.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known.iter().map(|candidate| (distance(word, candidate), *candidate)).filter(|(distance, _)| *distance <= 2).min().map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
