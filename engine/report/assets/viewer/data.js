"use strict";
// The packed data of the token viewer: see engine/report/viewer/pack.py and columns.py.

const NONE = 0xffff; // of two bytes: no value
const LOSS = 1, IN_STUDENT = 2, IN_TEACHER = 1, IS_SCORED = 2, IS_FIRST = 4; // bits of the flags
const NATS = ["student_surprise", "student_entropy", "teacher_surprise", "teacher_entropy", "reverse_kl", "forward_kl", "span_student", "span_teacher"];

/** Stands for the measure of rollouts without any scores. */
const NOTHING = { id: "", name: "nothing", unit: "", how: "These rollouts have no scores yet, so their tokens have no colour.", edges: [], worst: "high", bad: 0, of_teacher: false };

/** Measures that are made of two others; of a teacher with an interval its middle is stored. */
const DERIVED = {
  advantage: ["student_surprise", "teacher_surprise", (student, teacher) => student - teacher],
  span_advantage: ["span_student", "span_teacher", (student, teacher) => student - teacher],
  entropy_gap: ["student_entropy", "teacher_entropy", (student, teacher) => Math.abs(student - teacher)],
};

/** Unpack `viewer.data`; the result answers for the numbers of any response and position. */
async function unpackViewer(viewer) {
  const packed = Uint8Array.from(atob(viewer.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  const headEnd = 4 + new DataView(raw.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(raw.subarray(4, headEnd)));
  return viewerModel(viewer, head, unpackColumns(raw.subarray(headEnd), head.columns));
}

/** Put the bytes of each column together again: the lowest ones come first. */
function unpackColumns(raw, listed) {
  const columns = {};
  let at = 0;
  for (const [name, width, count] of listed) {
    const column = new (width === 1 ? Uint8Array : width === 2 ? Uint16Array : Uint32Array)(count);
    for (let plane = 0; plane < width; plane++, at += count) {
      for (let i = 0; i < count; i++) column[i] |= raw[at + i] << (8 * plane);
    }
    columns[name] = column;
  }
  return columns;
}

/** Return n + 1 offsets of n counts. */
function offsetsOf(counts) {
  const offsets = new Uint32Array(counts.length + 1);
  counts.forEach((count, i) => { offsets[i + 1] = offsets[i] + count; });
  return offsets;
}

function viewerModel(viewer, head, columns) {
  const { sequences, prompts, steps } = head;
  const teachers = head.teachers.map((each) => each.name);
  const rows = offsetsOf(sequences.map((each) => each.length));
  // A teacher has rows of the responses alone that it scored.
  const teacherRows = teachers.map((name) =>
    offsetsOf(sequences.map((each) => (each.teachers.includes(name) ? each.length : 0))));
  const promptRows = offsetsOf(prompts.map((each) => each.length));
  const studentEntries = offsetsOf(columns.student_count);
  const ownEntries = teachers.map((_, t) => offsetsOf(columns[`${t}.own_count`]));
  // Tokens of a teacher with another tokenizer, at the first position of each span.
  const spanEntries = teachers.map((_, t) => offsetsOf(columns[`${t}.span_count`] ?? []));
  const cached = new Map();

  sequences.forEach((sequence, index) => {
    sequence.index = index;
    sequence.key = `${sequence.source}/${sequence.number}`;
    sequence.teachers = sequence.teachers.map((name) => teachers.indexOf(name));
  });
  // Where the student's list entries of a teacher's first row begin: its rows may skip responses.
  const atStudent = teachers.map((_, t) => offsetsOf(sequences.map((each, i) =>
    (each.teachers.includes(t) ? studentEntries[rows[i + 1]] - studentEntries[rows[i]] : 0))));

  function stored(name, sequence, teacher) {
    const ofStudent = name.startsWith("student");
    const column = columns[ofStudent ? name : `${teacher}.${name}`];
    const start = ofStudent ? rows[sequence.index] : teacherRows[teacher]?.[sequence.index];
    const values = new Float64Array(sequence.length).fill(NaN);
    if (!column || (!ofStudent && !sequence.teachers.includes(teacher))) return values;
    const step = NATS.includes(name) ? steps.nats : steps.shares;
    for (let i = 0; i < values.length; i++) {
      if (column[start + i] !== NONE) values[i] = column[start + i] * step;
    }
    return values;
  }

  /** The values of a measure at all positions of a response; NaN where there is none. */
  function values(name, sequence, teacher) {
    const key = `${name} ${sequence.index} ${teacher}`;
    if (!cached.has(key)) {
      const [first, second, join] = DERIVED[name] ?? [name];
      let found = stored(first, sequence, teacher);
      if (join) {
        const other = stored(second, sequence, teacher);
        found = found.map((value, i) => join(value, other[i]));
      }
      cached.set(key, found);
    }
    return cached.get(key);
  }

  // Without a tokenizer the id stands for the text.
  const token = (index) => ({ text: head.texts[index] ?? `${columns.text_id[index]} `, bytes: head.bytes[index] ?? "", id: columns.text_id[index] });
  const logProb = (column, at) => (column[at] === NONE ? null : Math.exp(-column[at] * steps.log_probs));
  const probability = (surprise) => (Number.isNaN(surprise) ? null : Math.exp(-surprise));

  /** Both top lists at a position: entries {token, p, q, chosen}, null = not in that model's list. */
  function lists(sequence, teacher, position) {
    const row = rows[sequence.index] + position;
    const has = sequence.teachers.includes(teacher);
    const teacherRow = has ? teacherRows[teacher][sequence.index] + position : -1;
    const at = (name) => values(name, sequence, teacher)[position];
    const entries = [{
      token: token(columns.token[row]), chosen: true,
      p: probability(at("student_surprise")), q: has ? probability(at("teacher_surprise")) : null,
      inStudent: (columns.flags[row] & IN_STUDENT) > 0,
      inTeacher: has && (columns[`${teacher}.flags`][teacherRow] & IN_TEACHER) > 0,
    }];
    const begin = studentEntries[row], end = studentEntries[row + 1];
    const shift = has ? atStudent[teacher][sequence.index] - studentEntries[rows[sequence.index]] : 0;
    for (let i = begin; i < end; i++) {
      const q = has ? logProb(columns[`${teacher}.at_student`], i + shift) : null;
      entries.push({ token: token(columns.student_id[i]), p: logProb(columns.student_log_prob, i), q, inStudent: true, inTeacher: q !== null });
    }
    for (let i = ownEntries[teacher]?.[teacherRow], last = ownEntries[teacher]?.[teacherRow + 1]; i < last; i++) {
      const p = logProb(columns[`${teacher}.own_log_p`], i);
      entries.push({ token: token(columns[`${teacher}.own_id`][i]), p, q: logProb(columns[`${teacher}.own_log_prob`], i), inStudent: p !== null, inTeacher: true });
    }
    return {
      entries,
      scored: has && (columns[`${teacher}.flags`][teacherRow] & IS_SCORED) > 0,
      counted: (columns.flags[row] & LOSS) > 0,
      studentTail: at("student_tail"), teacherTail: has ? at("teacher_tail") : NaN,
    };
  }

  /** The span of a position: {first, last, tokens, p, q} with log-probs, null = in none. */
  function spanOf(sequence, teacher, position) {
    if (!columns[`${teacher}.span_count`] || !sequence.teachers.includes(teacher)) return null;
    const start = teacherRows[teacher][sequence.index];
    const has = (i, bit) => (columns[`${teacher}.flags`][start + i] & bit) > 0;
    if (!has(position, IS_SCORED)) return null;
    let first = position, last = position;
    while (!has(first, IS_FIRST)) first -= 1;
    while (last + 1 < sequence.length && has(last + 1, IS_SCORED) && !has(last + 1, IS_FIRST)) last += 1;
    const [begin, end] = spanEntries[teacher].subarray(start + first, start + first + 2);
    return {
      first, last, p: -values("span_student", sequence, teacher)[position], q: -values("span_teacher", sequence, teacher)[position],
      tokens: Array.from(columns[`${teacher}.span_id`].subarray(begin, end), token),
    };
  }

  const measures = head.measures.filter((each) => sequences.some((sequence) =>
    (each.of_teacher ? sequence.teachers : [0]).some((teacher) =>
      values(each.id, sequence, teacher).some((value) => !Number.isNaN(value)))));
  if (!measures.length) measures.push(NOTHING);
  return {
    notes: viewer.notes, sources: head.sources, sequences, prompts, teachers, measures, values, lists, spanOf,
    ks: head.teachers.map((each) => each.k), digits: Math.round(-Math.log10(steps.nats)),
    tokenAt: (sequence, position) => token(columns.token[rows[sequence.index] + position]),
    tokenNumber: (sequence, position) => columns.token[rows[sequence.index] + position],
    promptTokens: (index) => Array.from(
      columns.prompt_token.subarray(promptRows[index], promptRows[index + 1]), token),
  };
}
