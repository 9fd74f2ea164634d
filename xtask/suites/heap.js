// Fills V8's heap, typed arrays and a worker's heap, and prints what it finds: a name, a tab, a sum.
'use strict';
const { createHash } = require('node:crypto');
const { Worker, isMainThread, parentPort, workerData } = require('node:worker_threads');

let state = 0;

function next() {
  state = (Math.imul(state, 1103515245) + 12345) >>> 0;
  return state >>> 8;
}

/** Objects and strings that are replaced again and again. */
function churn(seed) {
  state = seed;
  const entries = new Map();
  for (let round = 0; round < 5; round++) {
    for (let key = 0; key < 60000; key++) {
      entries.set(key, { key, round, name: `entry ${key} ${next() % 100}`, list: [key, round, next()] });
    }
    for (let key = round; key < 60000; key += 7) entries.delete(key);
  }
  const hash = createHash('sha256');
  for (const key of [...entries.keys()].sort((a, b) => a - b)) {
    const entry = entries.get(key);
    if (entry.key !== key || entry.list[0] !== key || entry.round !== 4) throw new Error(`wrong entry ${key}`);
    hash.update(JSON.stringify(entry));
  }
  return hash.digest('hex');
}

function arrays() {
  const hash = createHash('sha256');
  for (let round = 0; round < 6; round++) {
    const numbers = new Float64Array(2 << 20);
    for (let at = 0; at < numbers.length; at++) numbers[at] = at * 1.5 + round;
    numbers.subarray(0, 1 << 18).sort((a, b) => b - a);
    hash.update(numbers);
  }
  return hash.digest('hex');
}

function text() {
  let ropes = '';
  for (let number = 0; number < 300000; number++) ropes += number.toString(36);
  const words = ropes.match(/[a-z]+/g).sort();
  return createHash('sha256').update(words.join(' ')).digest('hex');
}

if (isMainThread) {
  const worker = new Worker(__filename, { workerData: 7 });
  worker.on('message', (sum) => console.log(`worker\t${sum}`));
  worker.on('error', (error) => { throw error; });
  console.log(`map\t${churn(1)}`);
  console.log(`arrays\t${arrays()}`);
  console.log(`text\t${text()}`);
} else {
  parentPort.postMessage(churn(workerData));
}
